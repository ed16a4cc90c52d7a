"""The README's recipe for nodes without a network. Run: python -m pytest tests/test_offline.py"""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, SCRIPTS, train_args
