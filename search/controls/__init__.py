"""What a learned router is compared with at equal cost, by name: see ``natsl.search.controls.registry``."""
