"""What must know about several processes: collective operations, ZeRO-3's partitioned weights, memory per rank."""
