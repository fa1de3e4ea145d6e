"""Processes that evaluate for a search: the table of their tasks, the process, who starts and who asks them."""
