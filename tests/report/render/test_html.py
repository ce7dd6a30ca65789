"""A page as HTML: its elements, with roles that a screen reader understands."""

from cushion_deploy.report.render.elements import Page
from cushion_deploy.report.render.html import render_html


def test_every_element_is_written(page: Page) -> None:
    html = render_html(page)
    for part in (
        "<title>tab</title>",
        '<p class="eyebrow"><span class="status passed">Passed</span> today</p>',
        "<h1>headline</h1>",
        '<p class="quiet">introduction</p>',
        "<div><dt>label</dt><dd><b>12\u00a0%</b><span>of it</span></dd></div>",
        '<section id="anchor"><h2>title of section</h2>',
        '<p>plain <code>code|`x</code><span class="quiet">quiet</span></p>',
        '<p class="note">remark</p>',
        "<h3>caption</h3>",
        '<th scope="col">name</th><th scope="col">left</th><th scope="col" class="n">right</th>',
        '<tr class="group"><th colspan="3" scope="rowgroup">group of rows</th></tr>',
        '<th scope="row">row one</th><td>1\u00a0%</td><td class="n strong"><code class="token">l<i>⏎</i></code> '
        '<span class="status passed">holds</span></td>',
        "<details><summary>summary &lt;b&gt;</summary>",
        '<pre class="long">a\n```\nb</pre>',
        'alt="alternative"',
        "<footer>footer</footer>",
    ):
        assert part in html


def test_a_table_without_headings_has_no_head(page: Page) -> None:
    assert render_html(page).count("<thead>") == 1
