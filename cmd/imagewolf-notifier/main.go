// Command imagewolf-notifier hears of images that are pushed and has nodes
// prefetch them. Everything it does is in package command.
package main

import (
	"os"

	"github.com/imagewolf/imagewolf/cmd/imagewolf-notifier/command"
	"github.com/imagewolf/imagewolf/internal/program"
)

func main() { os.Exit(program.Run(command.App())) }
