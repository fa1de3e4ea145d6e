"""How good the samplers are: hypervolume against the number of evaluations, on problems that cost nothing."""
