"""Quality control, the published store's last step, reports and the table of all samples."""
