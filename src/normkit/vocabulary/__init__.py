"""The nouns of normkit: frozen dataclasses, standard library only.

Who has read these short files knows the language of the library.
"""
