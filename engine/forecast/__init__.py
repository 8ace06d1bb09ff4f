"""What fills a skipped evaluation, and when one may be skipped."""
