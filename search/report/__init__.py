"""What a search shows: the page, the picture and the lines on the terminal, all drawn from a ``Front``."""
