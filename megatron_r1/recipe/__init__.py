"""What the R1 recipe does between training commands: rejection sampling, cold-start data, filters, data sheets."""
