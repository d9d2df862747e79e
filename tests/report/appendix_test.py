# SPDX-License-Identifier: Apache-2.0
"""An end of the page that tells what the numbers were measured on."""

import sample_page as sample

from nad_jax.report import html as page


def test_the_definitions_say_how_many_images_were_counted():
    text = sample.Reader(page.render(sample.make_report())).text
    assert "500 clean test images" in text and "450 triggered" in text
