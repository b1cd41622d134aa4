"""The controlled experiment: on which data, and at which patch sizes, does Spectral Forcing help?

Small networks are trained on built-in scenes whose high frequencies are set, once per way of forcing the input and
with everything else equal: weights at the start, pictures and their order, noise, times and label drops.
"""
