"""The paper's tables: sweeps over methods and subjects, as Ray tasks whose results are kept."""
