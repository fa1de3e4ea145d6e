"""The outer search: over settings of the training, where each trial is a supernet and its front is what counts."""
