"""What a run leaves for people: pictures of its results and one self-contained HTML page."""
