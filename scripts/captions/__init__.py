"""The controlled experiment with captions: does Spectral Forcing help text to image, and where?"""
