"""What commands share: requests, opened inputs, plans, records and reports of a job."""
