"""Search over the routing policies of a trained supernet: study, baselines, front and report."""
