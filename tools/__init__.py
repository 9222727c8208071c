"""What measures and converts; the scripts above are what trains and samples."""
