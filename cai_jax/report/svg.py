"""Write matplotlib figures as SVG for a page, and as SVG and PDF files.

matplotlib writes style attributes, links and clip paths, which the security policy of the page
forbids. `inline_svg` replaces them with plain attributes and shapes. Black becomes the text colour
of the page. Elements in a colour of the palette get a class, so that a page can restyle the figure
for a dark background. Browsers show the values of a point as its title, on hover.
"""

import dataclasses
import io
import os
import pathlib
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cai_jax.report.elements import escape
from cai_jax.report.palette import COLOURS
from cai_jax.runtime.files import replacing

FONT_SIZE = 12
FILE_FONTS = 'Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif'  # in SVG files
GID = 'cai'  # marks the artists whose names are kept: 'cai-marker-3' gives the class 'marker'
SVG = '{http://www.w3.org/2000/svg}'
LINK = '{http://www.w3.org/1999/xlink}href'
SETTINGS: dict[Any, Any] = {  # of matplotlib
  'axes.edgecolor': 'black',
  'axes.facecolor': 'none',
  'axes.labelcolor': 'black',
  'figure.dpi': 72,  # so that a point, a pixel and a unit of the SVG are the same
  'figure.facecolor': 'none',
  'font.family': 'DejaVu Sans',  # comes with matplotlib, and is wider than most page fonts
  'font.size': FONT_SIZE,
  'lines.scale_dashes': False,
  'pdf.fonttype': 42,
  'svg.fonttype': 'none',  # text stays text
  'svg.hashsalt': 'cai_jax',
  'text.color': 'black',
  'text.parse_math': False,
  'xtick.color': 'black',
  'ytick.color': 'black',
}


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A figure with its description and hover titles, which matplotlib cannot store.

  Attributes:
    figure: the figure.
    description: one sentence for readers who cannot see the figure.
    titles: the text of each artist's hover title, by the artist's gid.
  """

  figure: Figure
  description: str
  titles: dict[str, str]


@contextmanager
def figure_settings() -> Iterator[None]:
  """Apply our matplotlib settings within a `with` block."""
  with matplotlib.rc_context(), warnings.catch_warnings():
    matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
    matplotlib.rcParams.update(SETTINGS)
    warnings.filterwarnings('ignore', message='Glyph .* missing from')  # pages use other fonts
    yield


def inline_svg(drawing: Drawing) -> str:
  """Return the drawing as an `<svg>` element for the page."""
  buffer = io.StringIO()
  with figure_settings():
    drawing.figure.savefig(buffer, format='svg', metadata={'Date': None})
  root = ET.fromstring(buffer.getvalue())
  shapes = {node.get('id', ''): node for node in root.iter(SVG + 'path')}
  body = ''.join(_element(child, shapes, drawing.titles) for child in root)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="{root.get("viewBox")}" '
    f'role="img" aria-label="{escape(drawing.description)}" font-family="inherit" '
    f'font-size="{FONT_SIZE}" fill="currentColor" stroke-linejoin="round">{body}</svg>'
  )


def save_drawing(drawing: Drawing, path: str | os.PathLike) -> list[pathlib.Path]:
  """Write the drawing as `PATH.svg` and `PATH.pdf`, black on white, and return both paths.

  Args:
    drawing: the drawing.
    path: path of the files, without suffix.
  """
  svg, pdf = (pathlib.Path(f'{os.fspath(path)}.{suffix}') for suffix in ('svg', 'pdf'))
  with replacing(svg) as temporary:
    temporary.write_text(_standalone(inline_svg(drawing)), 'utf-8')
  with figure_settings(), replacing(pdf) as temporary:
    drawing.figure.savefig(
      os.fspath(temporary), format='pdf', facecolor='white', metadata={'CreationDate': None}
    )
  return [svg, pdf]


def _standalone(svg: str) -> str:
  """Return an inline SVG as the text of a file, with its own fonts, colours and size in pixels."""
  match = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
  assert match is not None
  width, height = match.groups()
  head, tail = svg.split('>', 1)
  head = head.replace('font-family="inherit"', f'font-family="{FILE_FONTS}" color="#000000"')
  return (
    f'{head} width="{width}" height="{height}">'
    f'<rect width="{width}" height="{height}" fill="#ffffff"/>{tail}\n'
  )


def _element(node: ET.Element, shapes: dict[str, ET.Element], titles: dict[str, str]) -> str:
  """Return an element of matplotlib's SVG and its children, without what the policy forbids."""
  tag = node.tag.removeprefix(SVG)
  if tag == 'g':
    body = ''.join(_element(child, shapes, titles) for child in node)
    gid = node.get('id', '')
    if not gid.startswith(GID):
      return body
    title = f'<title>{escape(titles[gid])}</title>' if gid in titles else ''
    return f'<g class="{gid.split("-")[1]}">{title}{body}</g>'
  if tag == 'path':
    return _path(node.get('d', ''), _style(node))
  if tag == 'use':  # a marker
    shape = shapes[node.get(LINK, '')[1:]]
    x, y = _rounded(node.get('x', '0')), _rounded(node.get('y', '0'))
    return _path(shape.get('d', ''), _style(shape) | _style(node), f'translate({x} {y})')
  if tag == 'text':
    return _text(node)
  return ''  # definitions, metadata and the style sheet


def _path(d: str, style: dict[str, str], transform: str = '') -> str:
  attributes = {'d': _rounded(' '.join(d.split()))}
  if transform:
    attributes['transform'] = transform
  classes = []
  for name in ('fill', 'stroke'):
    colour = style.get(name)
    if colour in COLOURS:
      classes += [f'c{COLOURS.index(colour)}', name]
    if colour is not None:
      attributes[name] = 'currentColor' if colour in ('#000000', 'black') else colour
  if classes:
    attributes['class'] = ' '.join(dict.fromkeys(classes))
  if style.get('stroke', 'none') != 'none':
    names = ('stroke-width', 'stroke-opacity', 'stroke-dasharray', 'stroke-linecap', 'opacity')
    attributes |= {name: style[name] for name in names if name in style}
  return f'<path {_attributes(attributes)}/>'


def _text(node: ET.Element) -> str:
  style = _style(node)
  attributes = {'x': _rounded(node.get('x', '0')), 'y': _rounded(node.get('y', '0'))}
  attributes['text-anchor'] = style.get('text-anchor', 'start')
  transform = node.get('transform', '')
  if transform and not transform.startswith('rotate(-0 '):
    attributes['transform'] = _rounded(transform)
  if style.get('font-weight', style.get('font', '')).startswith(('700', 'bold')):
    attributes['font-weight'] = '600'
  return f'<text {_attributes(attributes)}>{escape(node.text or "")}</text>'


def _style(node: ET.Element) -> dict[str, str]:
  """Return the style attribute of an element as a dict."""
  pairs = (item.split(':', 1) for item in node.get('style', '').split(';') if ':' in item)
  return {name.strip(): value.strip() for name, value in pairs}


def _attributes(values: dict[str, str]) -> str:
  return ' '.join(f'{name}="{escape(value)}"' for name, value in values.items())


def _rounded(text: str) -> str:
  """Return the text with its decimal numbers rounded to two places."""
  return re.sub(r'-?\d+\.\d+', lambda match: f'{round(float(match[0]), 2):g}', text)
