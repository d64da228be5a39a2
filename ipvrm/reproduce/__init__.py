"""The paper's figures and tables, at the scales that a machine allows."""
