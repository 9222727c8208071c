"""nanoGPT's name for  python prepare_data.py NAME,  NAME being this folder's."""
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
sys.path.insert(0, str(folder.parents[1]))

if __name__ == "__main__":
    from prepare_data import main
    main([folder.name, f"--data_dir={folder.parent}", *sys.argv[1:]])
