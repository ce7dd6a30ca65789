"""The paper's tables and figures for any model: measured cell by cell, told in tables, prose, figures and a page."""
