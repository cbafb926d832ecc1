"""The operators, one folder each: api, schema, reference, spec and one file a backend."""
