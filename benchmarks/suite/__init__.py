"""What every benchmark shares: cases and timing, inputs, contenders, tables and plots."""
