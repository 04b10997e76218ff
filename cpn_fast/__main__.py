from cpn_fast.cli import main

main()
