module podferry.dev/podferry/deploy/testcluster

go 1.26.0
