"""Comparing routers: variants of a supernet are trained over seeds and judged beside their controls."""
