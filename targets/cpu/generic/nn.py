BODIES = {}
