"""What the four scripts share. Imports go one way: tools -> scripts -> nanodva -> model.py."""
