"""Models of a pod: they are compiled and read without one.

    adaptivejax compile configs/scale/NAME.py --topology v5e:16x16

Each file says how it trains, `config(budget)`, and how it generates,
`decoding()`.  At a budget of 1 it is its dense twin.
"""
