"""Folders of pictures in, safe pixels and labels out."""
