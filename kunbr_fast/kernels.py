"""Stands in for the package in ../kernels, in a checkout."""

from kunbr_fast import checkout

checkout.load(__name__)
