// Command imagewolf is the daemon of an ImageWolf node and the operator's tool
// beside it. Everything it does is in package command.
package main

import (
	"os"

	"github.com/imagewolf/imagewolf/cmd/imagewolf/command"
	"github.com/imagewolf/imagewolf/internal/program"
)

func main() { os.Exit(program.Run(command.App())) }
