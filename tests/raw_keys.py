"""How large random projections are where a rule does not normalise its keys.

Keys longer than 1 let a state grow without bound (to 1e21 in 70 tokens), and with it the luck of the first roundings:
no tolerance is right for that.
"""

RAW = 0.15  # times a standard normal number, times up to 2: keys of rank 12 are shorter than 1, but for rare ones
