"Everything about the distribution is in settings.ini; this only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
packages = cfg['packages'].split()
statuses = ['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive']


class BuildPy(build_py):
    "Ship no `_nbdev.py`: it serves the notebooks of a checkout, and needs nbdev"
    def find_package_modules(self, package, package_dir):
        return [o for o in super().find_package_modules(package, package_dir) if o[1] != '_nbdev']


setup(
    cmdclass=dict(build_py=BuildPy),
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    keywords=cfg['keywords'].split(', '), license=cfg['license'], license_files=['LICENSE', 'THIRD_PARTY.md'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')},
    packages=find_packages(include=[glob for p in packages for glob in (p, f'{p}.*')]),
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{p}={p}._modidx:d' for p in packages]),
    classifiers=[f'Development Status :: {cfg["status"]} - {statuses[int(cfg["status"])-1]}',
                 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Programming Language :: Python :: 3 :: Only'])
