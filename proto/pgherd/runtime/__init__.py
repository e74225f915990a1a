"""What every process of pgherd needs from its machine: configuration, logging, clocks, durable files,
children, TLS and the rendering of results and errors. No policy lives here."""
