import os
os.environ["TUNEH"]="16"; os.environ["TUNE1"]="1"; os.environ["TUNE2"]="1"
