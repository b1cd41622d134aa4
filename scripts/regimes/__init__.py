"""The controlled experiment: on which data, at which patch sizes, does Spectral Forcing help?"""
