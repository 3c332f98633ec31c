"""What tests share. Test modules import nothing from one another."""
