from baton.cli.root import main

main()
