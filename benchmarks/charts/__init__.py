"""The pictures of a report, as PNG. Ours are warm colours and solid lines, rivals cold colours and dashed lines."""
