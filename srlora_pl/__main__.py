from srlora_pl.cli import main

raise SystemExit(main())
