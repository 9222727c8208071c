"""nanoGPT's name for `python prepare_data.py NAME`, where NAME is the name of this folder."""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))


def main():
    import prepare_data
    prepare_data.main([FOLDER.name, f"--data_dir={FOLDER.parent}", *sys.argv[1:]])


if __name__ == "__main__":
    from nanodva.errors import run_script
    run_script(main)
