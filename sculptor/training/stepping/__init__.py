"""What an optimizer step is: all on the device, or one block at a time, behind one interface."""
