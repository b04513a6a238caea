"""Results as people see them: model cards, tables and plots."""
