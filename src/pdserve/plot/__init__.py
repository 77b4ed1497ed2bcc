"""Pictures as SVG, written by hand: a few curves, bands and bars on two axes need no library.

``axis`` maps values to places, ``chart`` puts curves and bands on a pair of axes, ``cdf`` and
``gantt`` are charts that are made often, ``files`` writes them. Nothing here knows what is drawn.
"""
