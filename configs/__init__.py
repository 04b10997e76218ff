"""The shipped experiments, installed as package data of cpn_fast.configs."""
