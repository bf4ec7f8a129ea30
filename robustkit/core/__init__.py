"""The core knows no strategy: values, registries, contracts, the loop. Read batch, spec and registry first."""
