"""Ways of distributing a network over processes: plain DDP, FSDP2, DeepSpeed ZeRO; `distribute` chooses."""
