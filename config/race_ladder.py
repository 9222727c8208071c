# What all rungs of the race on docs/race.md share, which has the commands that make the text:
#   python -m tools.race config/race_ladder.py config/race_4x64.py
dataset = "python"
block_size = 128
batch_size = 8
tokens_per_parameter = 20
dtype = "float32"
compile = False
results = "docs/race"
jobs = 2
