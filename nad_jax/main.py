# SPDX-License-Identifier: Apache-2.0
"""Runs the experiment that a config file describes.

    python -m nad_jax.main --config=FILE[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE]

FILE is a config of your own or one of those shipped (configs/*.py), found from any
folder. Results go to DIR, by default runs/<config>-<time>. Repeating a command with the
same --workdir continues where it stopped. Exit code 0: done (vet: accepted, audit:
honest, inspect: nothing found); 1: vet rejected the model, audit or inspect found
something; 2: something you can mend, in one line, or a bug of ours, with a traceback.

Ctrl-C (SIGINT) or SIGTERM: the step at work is finished and committed, one line says
so, and the exit code is 130 after SIGINT and 0 after SIGTERM, which is how schedulers
ask for the machine; 143 where 0 would be a verdict (vet, audit, inspect). A run is
finished when report.json is there. A second signal stops at once, with 128 + its
number; nothing that was committed is lost by that either.

On several machines, start the same command on each; in SLURM, Open MPI, Kubernetes or a
TPU pod they find each other (launch/README.md), or stop. Elsewhere each is also given
--coordinator_address=HOST:PORT, --num_processes=N, --process_id=0..N-1.
--distributed=required refuses to run alone unless --num_processes=1 says so,
--distributed=off insists on it. They wait --wait_seconds=300 for each other. A signal
to one of them stops all.
"""

import contextlib
import datetime
import importlib.util
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

# XLA says of every program in its cache, in a page of text, that it was compiled for
# another machine (jaxlib 0.10.1). Read when jax is imported; errors are exceptions.
# 1 is jax's own default, which children of a process with jax inherit.
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import ml_collections  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from nad_jax import errors, settings  # noqa: E402

_PACKAGE = pathlib.Path(__file__).parent
# In a checkout configs/ stands beside the package, in an installation inside it.
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_CONFIG_FLAGS = ("--config", "-config")
_TRACE = "Traceback (most recent call last)"


def main(argv: Sequence[str]) -> int:
    """Exit code of one command line."""
    if any(argument in ("--help", "-help", "-h") for argument in argv[1:]):
        print(f"{__doc__}\nShipped configs: {', '.join(_shipped_names())}")
        return 0
    try:
        return _run(*_parse(argv), argv)
    except errors.InputError as error:
        print(f"nad_jax: {error}", file=sys.stderr)
        _leave_cluster(error, 2)
        return 2
    except KeyboardInterrupt:
        print("nad_jax: interrupted before the run began", file=sys.stderr)
        return 130
    except Exception as error:
        # Python's own exit code would be 1, which is a verdict.
        traceback.print_exc()
        _leave_cluster(error, 2)
        return 2


def _parse(argv: Sequence[str]) -> tuple[Any, str, dict[str, Any]]:
    """Settings, workdir, and the arguments of `joining.join`."""
    values = flags.FlagValues()
    argv = _joined(argv)
    chosen = [_config_value(argument) for argument in argv if _is_config(argument)]
    if len(chosen) > 1:
        # The library would read the last one and drop every --config.KEY=VALUE.
        raise errors.InputError(
            f"--config is given {len(chosen)} times ({', '.join(chosen)}); give it "
            "once, variants joined with +"
        )
    file = f"config file {chosen[0].partition(':')[0]!r}" if chosen else "no config"
    argv = [_resolve(argument) for argument in argv]
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE[:VARIANT]",
        flag_values=values,
        lock_config=True,
        sys_argv=argv,
    )
    workdir = flags.DEFINE_string("workdir", None, "results", flag_values=values)
    join_flags = [
        flags.DEFINE_string("distributed", "auto", "when to join", flag_values=values),
        flags.DEFINE_string("coordinator_address", None, "of 0", flag_values=values),
        flags.DEFINE_integer("num_processes", None, "how many", flag_values=values),
        flags.DEFINE_integer("process_id", None, "which one", flag_values=values),
        flags.DEFINE_integer("wait_seconds", 300, "for others", flag_values=values),
    ]
    try:
        rest = values(argv, known_only=False)
        # A file that cannot be read raises when it is looked at.
        getattr(config.value, "job", None)
    except (AttributeError, KeyError) as error:
        if isinstance(error, AttributeError) and error.name == "get_config":
            raise errors.InputError(f"{file} has no function get_config") from None
        raise errors.InputError(_unknown_key(error, argv)) from None
    except TypeError:
        names = [a for a in argv if a.startswith("--config.")]
        raise errors.InputError(
            f"an override goes into a value that is not a section: {' '.join(names)}"
        ) from None
    except (flags.Error, ValueError) as error:
        line = _no_section(error) or _one_line(error)
        if _TRACE in str(error):
            line = f"{file}: {line}"
        raise errors.InputError(line) from None
    except (OSError, ImportError, SyntaxError) as error:
        reason = _one_line(error.__cause__ or error)
        raise errors.InputError(f"{file} cannot be read: {reason}") from None
    if len(rest) > 1:
        raise errors.InputError(f"unexpected argument {rest[1]!r}; see --help")
    if not config.present:
        raise errors.InputError(
            "--config is missing; shipped ones are "
            f"{', '.join(f'configs/{name}' for name in _shipped_names())}"
        )
    file_name = config_flags.get_config_filename(values["config"])
    if not isinstance(config.value, ml_collections.ConfigDict):
        raise errors.InputError(
            f"get_config of {file_name} must return an ml_collections.ConfigDict, got "
            f"{config.value!r:.80}"
        )
    name = pathlib.Path(file_name.split(":")[0]).stem
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    typed = settings.parse(config.value.to_dict())
    check_place(typed.data)
    mode, *others = join_flags
    return (
        typed,
        workdir.value or f"runs/{name}-{stamp}",
        {"mode": mode.value, **{flag.name: flag.value for flag in others}},
    )


def check_place(data: settings.DataSettings) -> None:
    """Raises InputError for a folder that nobody would look into.

    Only of a command: workdirs of earlier ones may hold such settings.
    """
    if data.name == "digits" and data.data_dir is not None:
        raise errors.InputError(
            "config.data.data_dir must be None for digits, which come with "
            f"scikit-learn, got {data.data_dir!r}"
        )


def _joined(argv: Sequence[str]) -> list[str]:
    """With --config FILE as --config=FILE, so that both are treated alike."""
    joined, rest = [], iter(argv)
    for argument in rest:
        if argument in _CONFIG_FLAGS and (value := next(rest, None)) is not None:
            argument = f"{argument}={value}"
        joined.append(argument)
    return joined


def _is_config(argument: str) -> bool:
    """Whether an argument is --config=FILE."""
    name, equals, _ = argument.partition("=")
    return name in _CONFIG_FLAGS and bool(equals)


def _config_value(argument: str) -> str:
    return argument.partition("=")[2]


def _resolve(argument: str) -> str:
    """--config=configs/x.py, wherever the current folder is."""
    if not _is_config(argument):
        return argument
    path, colon, variant = _config_value(argument).partition(":")
    if os.path.isdir(path):
        raise errors.InputError(_no_file(path, "is a folder"))
    if os.path.exists(path):
        return argument
    if pathlib.Path(path).parent.name not in ("configs", ""):
        raise errors.InputError(_no_file(path, "is not there"))
    return f"--config={shipped(pathlib.Path(path).name)}{colon}{variant}"


def shipped(name: str) -> pathlib.Path:
    """The shipped config file of that name.

    Raises:
      InputError: there is none.
    """
    for folder in _SHIPPED:
        if (folder / name).is_file():
            return folder / name
    raise errors.InputError(_no_file(name, "is not there"))


def shipped_config(name: str, variant: str = "") -> ml_collections.ConfigDict:
    """A variant of the shipped config file of that name.

    Raises:
      InputError: there is no such file or variant.
    """
    specification = importlib.util.spec_from_file_location("shipped", shipped(name))
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    try:
        return module.get_config(variant)
    except ValueError as error:
        raise errors.InputError(str(error)) from None


def _no_file(path: str, problem: str) -> str:
    known = ", ".join(f"configs/{name}" for name in _shipped_names())
    return f"config file {path!r} {problem}; shipped ones are {known}"


def _shipped_names() -> list[str]:
    return sorted({path.name for folder in _SHIPPED for path in folder.glob("*.py")})


def _unknown_key(error: Exception, argv: Sequence[str]) -> str:
    """ml_collections names only the last part of a dotted key, and quotes it twice."""
    words = re.findall(r"\w+", str(error).replace("\\n", " "))
    overrides = [a.partition("=")[0] for a in argv if a.startswith("--config.")]
    for override in overrides:
        if words and words[0] in override.split("."):
            hint = re.search(r'mean "(\w+)"', str(error))
            hint = f"; did you mean {hint[1]!r}?" if hint else ""
            return f"{override}: the config has no key {words[0]!r}{hint}"
    return _one_line(error)


def _no_section(error: Exception) -> str | None:
    """Of an override below a None, of which ml_collections says types; else None."""
    form = r'^Override (\S+) can not .* field "(\w+)" is None, and its type "(.*?)"'
    match = re.search(form, str(error))
    if match is None:
        return None
    override, last, kind = match.groups()
    parts = override.split(".")
    section = ".".join(["config", *parts[: parts.index(last) + 1]])
    if "ConfigDict" not in kind:
        return f"--config.{override}: {section} is not a section"
    return (
        f"--config.{override}: {section} is off in this variant; take a variant or a "
        "config file that turns it on"
    )


def _one_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if _TRACE in text:  # absl wraps what a config file raised, trace and all
        text = text.strip().splitlines()[-1]
        text = re.sub(r"^(nad_jax\.errors\.Input|Value|Type)Error: ", "", text)
    return " ".join(text.split()) or type(error).__name__


def _run(config: Any, path: str, how: dict[str, Any], argv: Sequence[str]) -> int:
    """`how`: arguments of `joining.join`."""
    import dataclasses

    from nad_jax.training import agreement, environment, joining

    environment.use_cpu_cores()
    # Once JAX has looked for devices, it is too late.
    processes = joining.join(**how)
    from nad_jax import (
        audit_experiment,
        efrap_experiment,
        inspect_experiment,
        nad_experiment,
        pipeline,
        vet_experiment,
        zoo,
    )
    from nad_jax import workdir as workdir_lib

    judges = {
        "audit": audit_experiment,
        "inspect": inspect_experiment,
        "vet": vet_experiment,
    }
    if config.job in judges and processes > 1:
        raise agreement.AgreedError(
            f"the job {config.job} runs in one process, got {processes}; use "
            "--distributed=off"
        )
    if config.job not in judges:
        config = zoo.resolve(config)
    environment.enable_compile_cache()
    with stop_requests() as stop:
        stopped = agreement.AgreedFlag(lambda: stop.number)
        workdir = workdir_lib.Workdir(
            path,
            dataclasses.asdict(config),
            should_stop=stopped,
            origin=pipeline.origin(),
        )
        try:
            command = " ".join(["python -m nad_jax.main", *argv[1:]])
            if config.job in judges:
                judge = judges[config.job]
                return judge.exit_code(judge.run(config, workdir, command=command))
            experiments = {"efrap": efrap_experiment, "nad": nad_experiment}
            experiments[config.job].run(config, workdir, command=command)
        except workdir_lib.Interrupted as interruption:
            if agreement.is_first():
                print(
                    f"nad_jax: interrupted: {interruption}; the same command with "
                    f"--workdir={path} goes on from there",
                    file=sys.stderr,
                )
            # The last commit is written.
            agreement.meet()
            asked_by_scheduler = stopped.number == signal.SIGTERM
            if asked_by_scheduler and config.job not in judges:
                return 0
            return 128 + stopped.number
        finally:
            workdir.close()
    return 0


def _leave_cluster(error: Exception, exit_code: int) -> None:
    """Ends the process if others may be waiting for it that do not know of the error.

    Imported here, since most mistakes are found before JAX is needed.
    """
    if "nad_jax.training.joining" not in sys.modules:
        return
    from nad_jax.training import agreement, joining

    if isinstance(error, agreement.AgreedError) or not joining.is_joined():
        return
    joining.abandon(exit_code)


class _StopRequest:
    """Whether a signal has asked to stop.

    Attributes:
      number: Of the first signal, 0 before it.
    """

    def __init__(self):
        self.number = 0

    def is_set(self) -> bool:
        return self.number != 0


@contextlib.contextmanager
def stop_requests() -> Iterator[_StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; the second ends the process.

    A handler in Python runs when the main thread next does, which may be minutes away
    while XLA compiles. So a thread of its own waits for what the signals write to a
    pipe.
    """
    request = _StopRequest()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen():
        while received := os.read(reading, 1):
            if received[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if request.is_set():
                os.write(2, b"nad_jax: stopped at once\n")
                os._exit(128 + received[0])
            request.number = received[0]
        os.close(reading)

    def ignore(number, frame):
        del number, frame

    earlier_pipe = signal.set_wakeup_fd(writing)
    earlier = {
        number: signal.signal(number, ignore)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_pipe)
        os.close(writing)
        listener.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
