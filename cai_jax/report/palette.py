"""Colours of figures and of the bars in tables.

The colours are from the set of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with
any colour vision can tell apart. SVG elements in colour i have the class `c` followed by i, such as
`c0`. The style sheet of the page can thus use other colours on a dark background.
"""

COLOURS = ('#d55e00', '#0072b2', '#009e73', '#cc79a7', '#56b4e9', '#8a6d00')
RATE_COLOURS = {'violation_rate': 0, 'helpful_rate': 1}  # indices into COLOURS
OTHER_COLOUR = 2  # of any other rate
